"""Context parallelism: the ops over sequences that are sharded over the devices of a mesh axis. One form a file."""
