"""just forecast: a small time-series transformer, fine-tuned with and without the attention barrier.

toto_like, base   the model; its pre-trained form        data     series and disturbances
bench             the command                            report   its table and plot, and docs/forecast.md
"""
