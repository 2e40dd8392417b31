"""Speed and memory, measured beside a named baseline."""
