"""What the model is, without a framework: parameters, rotary angles, a numpy reference, tolerances."""
