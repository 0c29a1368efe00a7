"""The few hot operations. Each has a NumPy float64 reference and a torch version under one signature."""
