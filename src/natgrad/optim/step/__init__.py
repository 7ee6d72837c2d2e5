"""How far to go along a direction: small pieces that a step is put together from."""
