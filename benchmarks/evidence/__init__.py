"""Does memory help? A controlled study: arms that differ in one thing, the same seeds for all.

data        what is trained on, and splits that don't overlap
networks    a small ResNet, VGG and MLP, and how to widen them to a number of parameters
recipes     all that decides a run, as frozen data: fixed before the runs that count
arms        from a network to what is compared: with memory, without, and what could explain it
adapting    from a trained network to what adapts it
training    the one loop that all of them go through
run         one configuration in, one row out
"""
