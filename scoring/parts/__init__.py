"""Jobs in parts: over lists that memory need not hold, into folders of this machine, shared disks and object stores."""
