"""Judges an op by its `OpSpec`: by an oracle, its mutants, the target's limits, and this device's bandwidth."""
