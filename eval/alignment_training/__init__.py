"""How the heads of the alignment score were trained and measured."""
