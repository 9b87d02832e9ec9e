// Reports every attempt of a process to reach another machine, in the file $LORAPLEX_TEST_OUTBOUND.
// Preloaded into servers, engines and trainers under test. Attempts fail with ENETUNREACH.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void report(const char *call, const char *what) {
    const char *path = getenv("LORAPLEX_TEST_OUTBOUND");
    char line[512];
    int size = snprintf(line, sizeof line, "%s %s by %s (%d)\n", call, what,
                        program_invocation_short_name, getpid());
    int file = path == NULL ? -1 : open(path, O_WRONLY | O_APPEND | O_CREAT, 0600);
    if (file >= 0) {
        if (write(file, line, (size_t)size) != size) abort();
        close(file);
    }
}

// Whether an address is of another machine; then it is reported.
static int leaves(const char *call, const struct sockaddr *address) {
    char text[INET6_ADDRSTRLEN] = "";
    if (address == NULL) return 0;
    if (address->sa_family == AF_INET) {
        const struct sockaddr_in *four = (const struct sockaddr_in *)address;
        unsigned host = ntohl(four->sin_addr.s_addr);
        if (host >> 24 == 127 || host == 0) return 0;
        inet_ntop(AF_INET, &four->sin_addr, text, sizeof text);
    } else if (address->sa_family == AF_INET6) {
        const struct in6_addr *six = &((const struct sockaddr_in6 *)address)->sin6_addr;
        if (IN6_IS_ADDR_LOOPBACK(six) || IN6_IS_ADDR_UNSPECIFIED(six)) return 0;
        if (IN6_IS_ADDR_V4MAPPED(six) && six->s6_addr[12] == 127) return 0;
        inet_ntop(AF_INET6, six, text, sizeof text);
    } else {
        return 0;
    }
    report(call, text);
    errno = ENETUNREACH;
    return 1;
}

int connect(int descriptor, const struct sockaddr *address, socklen_t size) {
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "connect");
    return leaves("connect", address) ? -1 : next(descriptor, address, size);
}

ssize_t sendto(int descriptor, const void *data, size_t length, int flags,
               const struct sockaddr *address, socklen_t size) {
    ssize_t (*next)(int, const void *, size_t, int, const struct sockaddr *, socklen_t) =
        dlsym(RTLD_NEXT, "sendto");
    if (leaves("sendto", address)) return -1;
    return next(descriptor, data, length, flags, address, size);
}

ssize_t sendmsg(int descriptor, const struct msghdr *message, int flags) {
    ssize_t (*next)(int, const struct msghdr *, int) = dlsym(RTLD_NEXT, "sendmsg");
    if (leaves("sendmsg", message->msg_name)) return -1;
    return next(descriptor, message, flags);
}

// The resolver's own connections are not made by the functions above.
int getaddrinfo(const char *node, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    int (*next)(const char *, const char *, const struct addrinfo *, struct addrinfo **) =
        dlsym(RTLD_NEXT, "getaddrinfo");
    unsigned char address[sizeof(struct in6_addr)];
    if (node != NULL && strcmp(node, "localhost") != 0 && inet_pton(AF_INET, node, address) != 1 &&
        inet_pton(AF_INET6, node, address) != 1) {
        report("getaddrinfo", node);
        return EAI_FAIL;
    }
    return next(node, service, hints, found);
}
