"""`natgrad claims`: what the sources of natgrad claim, each with a measurement and a rule."""
