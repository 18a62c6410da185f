"""The GPU campaign: everything a GPU machine is asked for, in the order of its worth, recorded as it happens.

``python -m tools.gpu`` runs it. Its parts, in the order in which a run passes them:

| stages.py    | what is asked for: a table of stages, most important first, with their seconds |
| campaign.py  | starts the stages, several at once where the GPU need not be alone, and ends them at their deadlines |
| processes.py | one stage is one process group whose output goes straight to a file |
| steps.py     | what those processes do; warming.py, measuring.py, profiling.py, products.py and outcomes.py do most |
| store.py     | the folder with the record: collected from the stages every second, copied to where it is asked for |
| summary.py   | the Markdown file: failures first |
| rehearsal.py | the same campaign without a GPU: ``python -m tools.gpu.rehearsal`` |
"""
