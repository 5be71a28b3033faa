"""From choices to the best variant: sense, allocate, try, finish, certify."""
