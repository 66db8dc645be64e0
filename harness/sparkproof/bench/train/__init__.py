"""`sparkproof bench train`: one QLoRA training step, side by side on several engines, each in processes of its own."""
