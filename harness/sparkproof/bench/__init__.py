"""`sparkproof bench ops`: what other libraries' ops take on this GPU, beside this project's, in one run."""
