"""Process groups and the exchange of messages. Knows no layers.

    rules        which ranks pool together, before there are any
    world        the default group, ranks and devices
    handles      what a module keeps of `process_group`
    debug        debug mode
    shared       sums through memory that the workers of one host share
    inflight     the last exchanges, and a watchdog for those that are stuck
    tally        counts and times of the exchanges
    hosts        which workers share a host
    consensus    debug mode: agreement on an exchange before it is made
    exchange     the messages: sums and gathers of float64
    naming       the names of groups that only their members make
    groups       the groups that statistics travel on
    agreement    agreement on the layers of a model and their groups
    compiled     the sum as an operator of compiled code

Each module imports only from those above it.
"""

# Registers the operator that `exchange.sum_` calls in code that is being compiled.
from syncnorm.comm import compiled as compiled
