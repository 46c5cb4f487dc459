"""From a publisher's folder to training batches.

sets/ and open.py read a data set's tables into records, prompts.py writes a prompt for each record, splits.py divides
the records by patient, reading.py decodes image files, cache.py stores what frozen networks make of them, and
loader.py yields batches. check.py and screening.py examine a data set before training.
"""
