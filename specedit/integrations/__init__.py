"""Places where SpecEdit plugs into other software, one module each."""
