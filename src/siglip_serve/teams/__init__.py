"""Tell the teams of football players apart."""
