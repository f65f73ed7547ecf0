"""Several processes that make up one run: finding one another, agreeing, and stopping together when one is lost.

    place       which of how many processes this is: from flags, from variables, or from the cluster
    supervisor  the parent process on each host, which starts the program as its child and watches it
    hub         what these parents tell one another
    coordinator the port where they meet, watched until they have
    child       the child's side: where it is in its work, last words, stacks
    board       where the child is in its work, in memory that both see
    lines       messages over a socket
    relay       the child's stderr, and what of it is held back
    connect     jax.distributed
    common      what the processes tell one another through jax's coordinator: results, errors, comparisons
    agreement   what they agree on between two steps, such as to stop

A process that is alone imports place, which imports nothing large, and has no parent.
"""
