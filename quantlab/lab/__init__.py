"""Tools for single notebooks: runs, blocks bit by bit, theory, timing, drawings, sliders."""
