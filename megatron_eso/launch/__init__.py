"""Starting processes: on this machine and on clusters. No torch here."""
