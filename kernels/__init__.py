"""The few hot operations. Each has a NumPy float64 reference, and a torch and a Triton version under one signature."""
