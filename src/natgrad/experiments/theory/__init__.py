"""`natgrad theory`: what the theory of wide networks predicts, beside what networks do."""
