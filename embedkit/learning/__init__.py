"""Learning the vectors: the only part of embedkit that imports torch."""
