"""What is known of how fast this machine is, kept between processes."""
