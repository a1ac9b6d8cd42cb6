// Colours of tokens: one ordered scale a measure and theme, and the ends of its domain.
// Lightness falls (light theme) or rises (dark theme) with the number; all colours keep the contrast of text at AA.
"use strict";

(function (agentropy) {
  const STOPS = {
    entropy: {
      light: ["#fcfaf4", "#f7e4b8", "#f7ce90", "#f9b86e", "#faa051", "#fb883c", "#f96e31"],
      dark: ["#1f1b15", "#452c00", "#5c3700", "#733f00", "#894501", "#a24800", "#bd4600"],
    },
    logprob: {
      light: ["#fbf9ff", "#e9e0ff", "#dccbfe", "#d0b8ff", "#c4a6fc", "#b995f7", "#ae84f2"],
      dark: ["#1c1b21", "#342855", "#463174", "#56388f", "#663fa7", "#7645bd", "#864ad2"],
    },
    advantage: {
      light: [
        "#fb6188",
        "#ff7f9a",
        "#fe9eae",
        "#febac4",
        "#fed6db",
        "#f9fafb",
        "#c8e7fe",
        "#a2d6fe",
        "#7dc6fe",
        "#5db6fa",
        "#3ba6f5",
      ],
      dark: [
        "#c52c5c",
        "#ad2951",
        "#932646",
        "#77233a",
        "#561f2c",
        "#1b1c1d",
        "#123754",
        "#0d4974",
        "#065991",
        "#0067ab",
        "#0075c3",
      ],
    },
    weight: {
      light: ["#f5fcf9", "#cbf1e2", "#aee6d0", "#93dcbf", "#78d2af", "#5ec89f", "#3fbe90"],
      dark: ["#161e1b", "#0f382e", "#08493a", "#005844", "#00664c", "#027354", "#027f5b"],
    },
  };

  const MEASURES = {
    entropy: {
      key: "1",
      label: "Entropy",
      unit: "nats",
      sign: "H",
      what: "how undecided the policy was here, in nats over the whole vocabulary",
    },
    logprob: {
      key: "2",
      label: "Log-probability",
      short: "Log-prob",
      unit: "nats",
      sign: "log p",
      what: "of the token that was drawn; the darker, the more surprising",
    },
    advantage: {
      key: "3",
      label: "Advantage",
      unit: "",
      sign: "A",
      what: "how much better than expected learning took this token to be; no colour at exactly 0",
    },
    weight: {
      key: "4",
      label: "Weight",
      unit: "×",
      sign: "w",
      what: "what multiplies the token in the loss: 1 is untouched, 0 is left out",
    },
  };

  // Where a number lies on its scale, 0 to 1; what is beyond the domain takes the colour of its end.
  function position(measure, value, domain) {
    const [low, high] = domain;
    const share = measure === "logprob" ? (high - value) / (high - low) : (value - low) / (high - low);
    return Math.min(1, Math.max(0, share));
  }

  const channels = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

  function between(stops, share) {
    const place = share * (stops.length - 1), first = Math.min(Math.floor(place), stops.length - 2);
    const from = channels(stops[first]), to = channels(stops[first + 1]), rest = place - first;
    return `rgb(${from.map((channel, at) => Math.round(channel + (to[at] - channel) * rest)).join(", ")})`;
  }

  // The colour of a number, or "" where there is none.
  function colour(measure, value, domain) {
    if (value === null || value === undefined || Number.isNaN(value)) return "";
    return between(STOPS[measure][agentropy.theme()], position(measure, value, domain));
  }

  // Ends of a scale for these numbers: round, the same for all of a tree, and not stretched by one stray token.
  function domainOf(measure, values) {
    if (measure === "logprob") return [-agentropy.nice(agentropy.quantile(values.map((value) => -value), 0.98)), 0];
    const top = agentropy.nice(agentropy.quantile(values.map(Math.abs), 0.98));
    if (measure === "advantage") return [-top, top];
    return [0, measure === "weight" ? Math.max(2, top) : top];
  }

  const gradient = (measure) => {
    const stops = STOPS[measure][agentropy.theme()];
    return `linear-gradient(to right, ${(measure === "logprob" ? [...stops].reverse() : stops).join(", ")})`;
  };

  Object.assign(agentropy, { STOPS, MEASURES, colour, domainOf, gradient });
})(window.agentropy);
