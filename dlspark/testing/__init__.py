"""Tools to test a plug-in: the contract as tests, toy models and data, faults, and a check for leaks."""
