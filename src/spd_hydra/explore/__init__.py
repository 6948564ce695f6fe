"""Looking into a decomposition: prompts, effects of ablations, two decompositions side by side."""
