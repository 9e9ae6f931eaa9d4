"""`siglip-serve teams`: teams of football players as labels and pictures."""
