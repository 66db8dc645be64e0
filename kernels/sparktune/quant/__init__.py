"""Quantised base weights: NF4 as bitsandbytes stores it, computed with sparktune's ops."""
