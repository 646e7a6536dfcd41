"""The main path: request, state, controls and the one generation loop."""
