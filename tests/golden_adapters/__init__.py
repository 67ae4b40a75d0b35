"""One module per paper: `ADAPTERS` maps a topic to a function of (input of a case, data folder) that returns what the topic expects."""
