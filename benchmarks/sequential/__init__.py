"""just bench-sequential: one adapter trained on tasks that follow one another.

tasks, data        the lines of every task and the split; lines as tokens         model    the small model, `model=tier`
measures, compose  losses, accuracy and metrics; cosines and routes               run      the phases of one seed
bench              the command          summary, report   statistics, verdict; tables and the plot
records            makes the committed records             claims, page   docs/sequential.md from them
"""
