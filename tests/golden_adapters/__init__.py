"""One module per paper: `ADAPTERS` maps a topic to a function of (input of a case, data folder) that returns what the topic expects."""

#: stands for a METEOR value where its Java program, or the package that holds it, is not on this machine
ABSENT = type('Absent', (), {'__repr__': lambda self: 'absent'})()
