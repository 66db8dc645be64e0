"""Engines that can train: one adapter a file, behind the protocol in `sparkproof.engines.base`."""
