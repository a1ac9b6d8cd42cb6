"""Methods on equal terms: a grid of recipes, environments and seeds from one file, and a report with intervals."""
