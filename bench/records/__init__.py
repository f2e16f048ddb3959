"""Records of measured cells: their schema, how they are read, merged and grouped. Standard library only."""
