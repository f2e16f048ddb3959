"""One module per kind of cell; a cost sweep is in `bench.measure.cost`."""
