from minillm_cli.main import main

main()
