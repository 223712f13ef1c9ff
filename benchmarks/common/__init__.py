"""What several benchmarks share.

options     key=value words, commands that Ctrl-C ends quietly    places   folders
records     environment, JSON and picture of a record             team     several processes, of which the first speaks
measure     time, memory and fidelity of a model                  text     the standard library's code and prose
statistics  quartiles, paired differences over seeds
"""
