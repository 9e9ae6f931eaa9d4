"""Operations of the clients, written once for both of them."""
