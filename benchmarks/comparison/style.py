"""The style sheet of a comparison's page: light and dark, wide and narrow, screen and paper.

- ``STYLE``: as it stands in the page. Blue and grey differ in lightness too, and in every form of colour blindness.
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --muted: #59616b; --rule: #d9dde2;
  --own: #0065a8; --base: #6d757e; --alarm: #b34700; --wash: #f4f6f8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --ink: #e7eaed; --muted: #a9b1ba; --rule: #343a41;
  --own: #63b8f0; --base: #9aa3ad; --alarm: #ff9d5c; --wash: #1d2126; } }
@media print { :root { --paper: #fff; --ink: #000; --muted: #444; --rule: #ccc; --own: #0065a8; --base: #6d757e;
  --alarm: #b34700; --wash: #fff; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  background: var(--paper); color: var(--ink); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 2px solid var(--ink); }
h3 { font-size: 1.1rem; margin: 2rem 0 .25rem; }
p, ul { max-width: 48rem; } .muted, figcaption, .gallery > p { color: var(--muted); }
.muted, .gallery > p { font-size: .93rem; margin: .25rem 0 .5rem; max-width: none; }
a { color: var(--own); } ul { padding-left: 1.2rem; } li { margin: .35rem 0; }
nav { margin-top: 1rem; font-size: .93rem; }
.scroll { overflow-x: auto; margin: .75rem 0; } .scroll:focus-visible { outline: 2px solid var(--own); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { text-align: right; padding: .3rem .7rem; border-bottom: 1px solid var(--rule); white-space: nowrap; }
thead th { white-space: normal; vertical-align: bottom; min-width: 4.5rem; color: var(--muted); font-weight: 600;
  overflow-wrap: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); padding-left: 0; }
tbody th { font-weight: 600; max-width: 12rem; white-space: normal; overflow-wrap: break-word; }
.grid { display: grid; gap: 1.1rem 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 27rem)); }
.grid.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
/* Rows shared with the neighbours: captions of unlike length leave the drawings level. */
figure { margin: 0; max-width: 34rem; break-inside: avoid; display: grid; grid-row: span 2; grid-template-rows: subgrid;
  row-gap: .3rem; align-items: start; }
figcaption { font-size: .88rem; line-height: 1.35; } figcaption b { color: var(--ink); display: block; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, sans-serif; overflow: visible; }
svg text { fill: var(--muted); } svg .name { fill: var(--ink); font-weight: 600; font-size: 13px; }
svg .name, svg .figure, svg .end { paint-order: stroke; stroke: var(--paper); stroke-width: 3px;
  stroke-linejoin: round; }
svg .figure, svg .end { fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .end.own { fill: var(--own); font-weight: 600; } svg .end.base { fill: var(--muted); }
svg path { fill: none; } svg .guide { stroke: var(--rule); } svg .level { stroke: var(--base); stroke-dasharray: 2 3; }
svg .line.own { stroke: var(--own); stroke-width: 2; }
svg .line.base { stroke: var(--base); stroke-width: 1.5; stroke-dasharray: 5 3; }
svg .band.own { fill: var(--own); opacity: .2; } svg .band.base { fill: var(--base); opacity: .2; }
svg .mark.own { fill: var(--own); } svg .mark.base { fill: var(--base); font-size: 9px; }
svg .dot.own { fill: var(--own); opacity: .65; }
svg .interval { stroke-width: 2.5; } svg .interval.own { stroke: var(--own); }
svg .interval.base { stroke: var(--base); }
svg .rug { stroke-width: 1.25; } svg .rug.own { stroke: var(--own); } svg .rug.base { stroke: var(--base); }
svg .point { stroke-width: 2; } svg .point.own { fill: var(--own); stroke: var(--own); }
svg .point.base { fill: var(--base); stroke: none; } svg .point.hollow { fill: var(--paper); }
svg .alarm path { stroke: var(--alarm); stroke-dasharray: 1 3; } svg .alarm text { fill: var(--alarm); }
details { margin: 1rem 0; } summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; padding: 1rem; background: var(--wash); border-radius: .4rem; font-size: .85rem;
  overflow-wrap: normal; }
@media (min-width: 60rem) { tbody th { min-width: 8.5rem; } }
@media print { body { font-size: 10pt; max-width: none; padding: 0; } .scroll { overflow: visible; }
  table { font-size: 7.5pt; } th, td { padding: .2rem .3rem; } th:first-child { position: static; }
  h2, h3 { break-after: avoid; } tr { break-inside: avoid; }
  .grid, .grid.wide { grid-template-columns: repeat(2, 1fr); } .grid.small { grid-template-columns: repeat(3, 1fr); } }
"""
