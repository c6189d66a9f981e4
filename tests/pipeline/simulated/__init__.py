"""The parts of the simulated device; the rules that they keep are in simulated_device.py."""
