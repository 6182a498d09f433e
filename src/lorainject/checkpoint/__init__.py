"""Merge adapters into the checkpoint of a model on disk, without loading the model.

merge_copy, merge_in_place    the public functions: merge into a copy, or into the checkpoint itself and back
plan                          read the adapters and the headers, and check everything before a byte is written
shard_writer, byte_runs       write one shard with the merged weights; which bytes change, and by what
shards, copying               the files of a checkpoint; copies within the kernel, with progress
"""
