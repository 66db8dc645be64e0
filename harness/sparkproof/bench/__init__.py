"""`sparkproof bench ops`: every op beside its peers, at the shapes of real models, on this device."""
