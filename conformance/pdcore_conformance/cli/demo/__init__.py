"""``pdcore demo``: every preset on recorded vowels, judged, timed and drawn."""
