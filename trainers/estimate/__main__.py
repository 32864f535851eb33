from trainers.estimate import main

main()
