"""The model independent of a framework: parameters, rotary embeddings, a numpy reference, stages, tolerances."""
