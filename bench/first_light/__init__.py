"""The first visit to a machine with a GPU: does it decode correctly there, and where does the time go?

`python -m bench.first_light FOLDER` runs every part in a process of its own with a time limit, appends one JSON line
per fact to FOLDER/first_light.jsonl as soon as it is known, and prints a table at the end. A part that dies, hangs or
loses the card loses nothing of what was found before. Without a GPU everything is scaled down, in a minute or two.
"""
