"""Jobs in processes of their own: how they are started, what runs in them, how they are watched."""
