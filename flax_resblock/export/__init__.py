"""Networks for use without this library: StableHLO artefacts, folded norms, compiled inference."""
