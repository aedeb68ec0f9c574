/* What carefork takes for granted of libc's fork, asked of musl (no Rust for musl on the machine that tests this). */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static char order[16];
static int errno_in_parent = -1;
static void note(char c) { order[strlen(order)] = c; }
static void first_prepare(void) { note('p'); errno = 0; }
static void first_parent(void) { errno_in_parent = errno; note('a'); }
static void first_child(void) { note('c'); }
static void second_prepare(void) { note('P'); }
static void second_parent(void) { note('A'); }
static void second_child(void) { note('C'); }

int main(void)
{
    int status;
    pthread_atfork(first_prepare, first_parent, first_child);
    pthread_atfork(second_prepare, second_parent, second_child);
    pid_t pid = fork();
    if (pid == 0)
        _exit(strcmp(order, "PpcC") ? 1 : 0); /* first registered: prepares last, runs first in the child */
    if (waitpid(pid, &status, 0) != pid || status != 0)
        return 2;
    if (strcmp(order, "PpaA"))
        return 3;
    if (errno_in_parent != 0) /* a fork that succeeded leaves errno alone */
        return 4;
    memset(order, 0, sizeof order);
    struct rlimit none = { 0, 0 };
    if (setuid(65534) || setrlimit(RLIMIT_NPROC, &none))
        return 5;
    pid = fork();
    if (pid == 0)
        _exit(0);
    if (pid != -1 || errno != EAGAIN)
        return 6;
    if (strcmp(order, "PpaA")) /* the parent handlers run after a failed fork too */
        return 7;
    if (errno_in_parent != EAGAIN) /* and can tell */
        return 8;
    return 0;
}
