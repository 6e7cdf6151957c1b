"""What single notebooks need: their runs, blocks bit by bit, theory, timing, sliders."""
