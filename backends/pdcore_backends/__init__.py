"""The backends that pdcore brings along, one package each."""
